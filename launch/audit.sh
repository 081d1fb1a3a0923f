#!/usr/bin/env bash
# Looks through the locked packages: their licences against those allowed, and known vulnerabilities.
#
#   bash launch/audit.sh [--licences] [--dry-run]
#
# The licences are read from the installed packages, offline; --licences does only that. The
# vulnerabilities (pip-audit, from PyPI's advisories) need the network, and a package that cannot be
# looked up fails. Both need the extra `dev`.
set -euo pipefail
cd "$(dirname "$0")/.."
dry_run='' licences_only=''
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=1 ;;
    --licences) licences_only=1 ;;
    *) sed -n '2,8s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
  esac
done
run() { if [[ -n $dry_run ]]; then printf '%q ' "$@" && echo; else "$@"; fi; }

# Permissive, or with a copyleft that ends at the file (MPL): all may be used and redistributed
# beside an Apache-2.0 package. Spelled as the packages spell them.
allowed=(
  'Apache-2.0' 'Apache Software License' 'Apache License 2.0' 'Apache 2.0' 'BSD' 'BSD License' '3-Clause BSD License' 'BSD-2-Clause' 'BSD-3-Clause'
  'MIT' 'MIT License' 'MIT-CMU' 'PSF-2.0' 'Mozilla Public License 2.0 (MPL 2.0)'
  'Apache-2.0 OR BSD-2-Clause' 'Apache-2.0 AND BSD-2-Clause' 'MIT OR AFL-2.1' 'MPL-2.0 AND MIT'
  'BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0'
)
# These give their whole licence as its name; read: Apache-2.0, MIT.
read_by_hand=(grain simple-parsing)
mapfile -t packages < <(sed -n 's/^\([a-z0-9._-]*\)==.*/\1/p' requirements/cpu.lock | sort -u)
run pip-licenses --from=mixed --packages "${packages[@]}" --ignore-packages "${read_by_hand[@]}" \
  --allow-only="$(IFS=';' && echo "${allowed[*]}")"
[[ -z $licences_only ]] || exit 0
for target in cpu cuda tpu; do
  run pip-audit --strict --require-hashes --disable-pip --requirement "requirements/$target.lock"
done
