"""What the stages share: settings, artifacts, records, the stage harness."""
