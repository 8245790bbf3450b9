#!/bin/sh
# Installs Debian's Chromium, if there is none and this may install packages. Never fails: without it one test is skipped.
command -v chromium >/dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "no chromium: the test of pages will be skipped (install the package chromium to run it)"
    exit 0
fi
{ apt-get update && apt-get install -y --no-install-recommends chromium; } >/dev/null 2>&1 ||
    echo "chromium could not be installed: the test of pages will be skipped"
