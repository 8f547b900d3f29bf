#!/usr/bin/env bash
# Cancelling a run stops every pod and every TrainJob it started.
source "$(dirname "$0")/test-lib.sh"
say "cancel"
name=kind-cancel-$(date +%s)
settings "$name" iterations=4 update.nodes=2
"$grpo" submit "$recipe" "${set_arguments[@]}"
trainjobs() { k get trainjobs --namespace "$runs_namespace" --output name; }
started() { [[ -n $(trainjobs) ]]; }
eventually 900 started || fail "no TrainJob in 15 minutes: $(stage_pods)"
run=$(runs_of "$name" | jq --slurp --raw-output '.[0].run_id')
"$grpo" cancel "$run"
nothing_left() { [[ -z $(stage_pods) && -z $(trainjobs) ]]; }
# The janitor comes every two minutes in this overlay.
eventually 300 nothing_left || fail "left behind: $(stage_pods) $(trainjobs)"
