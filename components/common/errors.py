"""Every error a user can cause.

    GrpoError
    ├── SettingsError        a setting is unknown, out of range or contradicts another
    ├── DataError            a data set, model folder or reward function cannot be used
    ├── ArtifactError        something about stored artifacts
    │   ├── ArtifactNotFound     no object or manifest of that name
    │   ├── AlreadyPublished     the name is taken by other content
    │   ├── DigestMismatch       bytes differ from what the manifest says
    │   └── StoreError           the object store refused or cannot be reached
    ├── StageError           a stage failed for a reason of its own
    └── HealthError          training left its limits; the last good policy is kept

A message says what was wrong, what was got and how to mend it.
"""


class GrpoError(Exception):
    """Base of every error whose message is meant for the user; printed without a traceback."""


class SettingsError(GrpoError):
    """A setting is unknown, out of range or contradicts another."""


class DataError(GrpoError):
    """A data set, model folder or reward function cannot be used."""


class ArtifactError(GrpoError):
    """Something about stored artifacts."""


class ArtifactNotFound(ArtifactError):
    """No object or manifest of that name."""


class AlreadyPublished(ArtifactError):
    """The name is taken by other content."""


class DigestMismatch(ArtifactError):
    """Bytes differ from what the manifest says."""


class StoreError(ArtifactError):
    """The object store refused or cannot be reached."""


class StageError(GrpoError):
    """A stage failed for a reason of its own."""


class HealthError(GrpoError):
    """Training left its limits; the last good policy is kept."""
