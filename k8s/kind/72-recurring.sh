#!/usr/bin/env bash
# A schedule fires once, and no more after it is taken back.
source "$(dirname "$0")/test-lib.sh"
say "a recurring run"
name=kind-schedule-$(date +%s)
settings "$name"
"$grpo" schedule "$recipe" --cron '*/2 * * * *' "${set_arguments[@]}"
fired() { [[ $(runs_of "$name" | wc -l) -ge 1 ]]; }
eventually 300 fired || fail "the schedule has not fired in 5 minutes: $(kfp recurringruns)"
"$grpo" unschedule "$name"
sleep 150
count=$(runs_of "$name" | wc -l)
[[ $count -eq 1 ]] || fail "$count runs of $name: it must fire once"
