# shellcheck shell=bash
# What the launch scripts run and print; they source it, with dry_run set or empty.

# One line that a shell reads as these arguments: for `ssh --command`, and to print.
quoted() {
  local argument line=''
  for argument in "$@"; do
    [[ $argument =~ ^[A-Za-z0-9_./:=@,+%~-]+$ ]] || argument=${argument@Q}
    line+="$argument "
  done
  printf %s "${line% }"
}
# Runs a command, or only prints it.
# shellcheck disable=SC2154
run() { if [[ -n $dry_run ]]; then quoted "$@" && echo; else "$@"; fi; }
