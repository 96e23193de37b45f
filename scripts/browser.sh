#!/usr/bin/env bash
# A headless Chromium for the tests of report.html, from Debian's packages where there is none. Needs root there.
set -euo pipefail
for name in chromium-headless-shell chromium chromium-browser google-chrome; do
  if command -v "$name"; then exit 0; fi
done
export DEBIAN_FRONTEND=noninteractive
apt-get update --quiet --quiet
apt-get install --quiet --quiet --yes --no-install-recommends chromium-headless-shell fonts-dejavu-core >/dev/null
command -v chromium-headless-shell
