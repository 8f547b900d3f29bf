#!/usr/bin/env bash
# The cluster and everything in it.
source "$(dirname "$0")/lib.sh"
need kind
kind delete cluster --name "$cluster"
rm -rf "$root/build/kind"
