"""Put a recipe's model and data into the bucket, and print the settings that point there, one a line.

    python k8s/kind/upload.py recipes/arithmetic/settings.toml s3://mlpipeline/grpo-kind

Reads AWS_ENDPOINT_URL_S3 and the keys from the environment; prints the store as pods see it ($POD_ENDPOINT).
"""

import os
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import boto3


def upload(client: "boto3.client", path: Path, bucket: str, prefix: str) -> str:
    """Upload a file or the files of a folder; the key of what it became."""
    key = f"{prefix}/{path.name}"
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    if not files:
        raise SystemExit(f"upload.py: nothing to upload at {path}; run the recipe's prepare.py first")
    for file in files:
        client.upload_file(str(file), bucket, f"{key}/{file.relative_to(path)}" if path.is_dir() else key)
    return key


def main() -> None:
    """Command line."""
    settings_file, target = Path(sys.argv[1]), urlsplit(sys.argv[2])
    settings = tomllib.loads(settings_file.read_text())
    query = f"?endpoint={os.environ['POD_ENDPOINT']}&region=us-east-1"
    client = boto3.client("s3", region_name="us-east-1")
    bucket, prefix = target.netloc, target.path.strip("/")
    print(f"store=s3://{bucket}/{prefix}/store{query}")
    for name, value in (("model", settings["model"]), ("dataset.source", settings["dataset"]["source"])):
        if str(value).startswith("./"):
            print(f"{name}=s3://{bucket}/{upload(client, settings_file.parent / value, bucket, prefix)}{query}")


if __name__ == "__main__":
    main()
