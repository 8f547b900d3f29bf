#!/usr/bin/env bash
# Build the images, push them, and write their digests to images/lock.json.
#
#   REGISTRY=registry.example.com/team TAG=0.1.0 scripts/build_images.sh [cpu|rollout|update|tracking]...
#
#   BUILDER=docker|buildah|podman   default: docker where its daemon answers, else buildah, else podman
#   PUSH=0                          keep the images here; the lock file then holds tags, not digests
#   ARGS_update="BASE=... TORCH=torch==2.13.0 TORCH_BACKEND=cpu"   build arguments of one image, ARGS_cpu and so on
#   BUILD_FLAGS="--isolation chroot"                 further flags of the builder
#   LOCK=images/lock.json
set -euo pipefail
cd "$(dirname "$0")/.."

: "${REGISTRY:?say where the images go: REGISTRY=registry.example.com/team}"
: "${TAG:?say which release this is: TAG=0.1.0}"
if [[ $TAG == latest ]]; then
  echo "build_images.sh: TAG=latest would change under a running fine-tune; use a release" >&2
  exit 1
fi
push=${PUSH:-1}
lock=${LOCK:-images/lock.json}
images=("$@")
[[ $# -gt 0 ]] || images=(cpu rollout update tracking)

find_builder() {
  if [[ -n ${BUILDER:-} ]]; then
    echo "$BUILDER"
  elif command -v docker >/dev/null && docker info >/dev/null 2>&1; then
    echo docker
  elif command -v buildah >/dev/null; then
    echo buildah
  elif command -v podman >/dev/null; then
    echo podman
  else
    echo "build_images.sh: no docker daemon, no buildah and no podman here; install one, or set BUILDER" >&2
    return 1
  fi
}
builder=$(find_builder)

# Tracked files alone: nothing of this machine gets into a layer by accident.
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
git ls-files -z -- pyproject.toml README.md LICENSE pipeline components images requirements |
  tar --create --null --files-from=- --file=- | tar --extract --directory "$context"

revision=$(git rev-parse HEAD)
git diff --quiet HEAD -- pipeline components images requirements || revision+=-dirty
# The commit's time, so that the same sources give the same labels.
created=$(git show --no-patch --format=%cI HEAD)

# Pushes a reference and prints the digest the registry knows it by.
push_image() {
  local reference=$1 digest_file=$context/digest
  if [[ $builder == docker ]]; then
    docker push --quiet "$reference" >&2
    docker image inspect --format '{{index .RepoDigests 0}}' "$reference" | sed 's/.*@//'
  else
    "$builder" push --digestfile "$digest_file" "$reference" >&2
    cat "$digest_file"
  fi
}

references=()
for name in "${images[@]}"; do
  [[ -f images/$name.Dockerfile ]] || { echo "build_images.sh: there is no images/$name.Dockerfile" >&2; exit 1; }
  repository=$REGISTRY/grpo-pipeline-$name
  arguments=(--build-arg "VERSION=$TAG" --build-arg "REVISION=$revision" --build-arg "CREATED=$created")
  own=ARGS_$name
  for argument in ${!own:-}; do
    arguments+=(--build-arg "$argument")
  done
  # shellcheck disable=SC2086 # BUILD_FLAGS is a list of words
  "$builder" build ${BUILD_FLAGS:-} "${arguments[@]}" --tag "$repository:$TAG" \
    --file "$context/images/$name.Dockerfile" "$context"
  if [[ $push == 1 ]]; then
    references+=("$name=$repository@$(push_image "$repository:$TAG")")
  else
    references+=("$name=$repository:$TAG")
  fi
done

python3 images/lock.py "$lock" "${references[@]}"
