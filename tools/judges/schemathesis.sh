#!/usr/bin/env bash
# Schemathesis on OpenAI's specification against a running `kbit serve MODEL --any-model`: no server errors, and answers
# as the specification has them. In an environment of its own: pip install schemathesis==4.32.5
#
#     tools/judges/schemathesis.sh openapi-serving.json http://127.0.0.1:8433 [more flags of `schemathesis run`]
set -euo pipefail
specification=$1 address=$2
shift 2
exec schemathesis run "$specification" --url "$address/v1" --seed 1 --no-color -n 15 \
    --include-path /completions --include-path /chat/completions --include-path /models \
    --include-path '/models/{model}' --include-path /responses --include-path /responses/input_tokens \
    --checks not_a_server_error,response_schema_conformance,content_type_conformance "$@"
