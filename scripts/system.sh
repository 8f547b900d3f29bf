#!/usr/bin/env bash
# What a few tests want beside Python, from Debian's packages where we may install them: Chromium for the report page,
# and a real S3 server (Ceph RGW, unpacked into a cache, never installed). Without them those tests say so and skip.
# SYSTEM=0 leaves the machine as it is.
set -uo pipefail
if [ "${SYSTEM:-1}" = 0 ]; then
    exit 0
fi
if ! command -v chromium >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "apt-get install chromium, for the tests of the report page (SYSTEM=0: skip them)"
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends chromium; } \
        >/dev/null 2>&1 || echo "no chromium to be had: the page's tests will skip"
fi
"$1" scripts/ceph_rgw.py install || echo "no Ceph packages to be had: tests against a real S3 server will skip"
