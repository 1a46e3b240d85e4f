#!/usr/bin/env bash
# Builds and starts what is in this folder, where docker and systemd run; says what could not be run here.
#     packaging/check.sh
set -euo pipefail
cd "$(dirname "$0")/.."

not_run() { printf 'not run here: %s\n' "$*"; }

# Whether a server on port $1 answers a question within two minutes.
answers() {
  for _ in $(seq 120); do
    if curl -fs "http://127.0.0.1:$1/health" >/dev/null; then
      curl -fs "http://127.0.0.1:$1/v1/completions" -H 'Content-Type: application/json' \
        -d '{"prompt": "Once upon a time", "max_tokens": 8}' | grep -q '"completion_tokens": *8'
      return
    fi
    sleep 1
  done
  return 1
}

if command -v hadolint >/dev/null; then
  hadolint packaging/Dockerfile
  echo "Dockerfile: hadolint has nothing to say"
else
  not_run "hadolint (not installed)"
fi
if docker info >/dev/null 2>&1; then
  docker build -f packaging/Dockerfile -t kbit-check .
  container=$(docker run -d -p 127.0.0.1:18080:8080 kbit-check)
  trap 'docker rm -f "$container" >/dev/null' EXIT
  answers 18080
  echo "the container serves"
else
  not_run "docker build and run (no docker daemon)"
fi

if command -v systemd-analyze >/dev/null; then
  # It wants the program to be there, so another stands for it; of what it says of other units nothing is shown.
  folder=$(mktemp -d)
  sed "s:/opt/kbit/bin/kbit:$(command -v true):" packaging/kbit.service >"$folder/kbit.service"
  said=$(systemd-analyze verify --man=no "$folder/kbit.service" 2>&1 | grep -F kbit.service || true)
  rm -r "$folder"
  if [ -n "$said" ]; then
    printf '%s\n' "$said"
    exit 1
  fi
  echo "kbit.service: systemd-analyze verify has nothing to say"
  systemd-analyze security --offline=yes --no-pager packaging/kbit.service | tail -n 1
else
  not_run "systemd-analyze verify (not installed)"
fi
if systemctl is-system-running >/dev/null 2>&1 && [ -x /opt/kbit/bin/kbit ] && [ "$(id -u)" = 0 ]; then
  unit=/run/systemd/system/kbit.service # gone with the next start of the system
  cp packaging/kbit.service "$unit"
  systemctl daemon-reload
  systemctl start kbit
  answers 8080
  systemctl stop kbit
  rm "$unit"
  systemctl daemon-reload
  echo "the service serves, and ends"
else
  not_run "the service (systemd is not running, or there is no /opt/kbit)"
fi
