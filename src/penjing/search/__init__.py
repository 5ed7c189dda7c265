"""The main job: from a model, its data and a budget to a certified artefact.

In the order in which a run goes through them:

| file | step |
|---|---|
| `optimize` | the whole job on one page |
| `open_session`, `session` | check everything, take the folder; what all steps share |
| `survey`, `survey_job` | look at the original |
| `baseline` | measure it in the target and in eager |
| `runtimes`, `runtimes_job` | choose runtime and float precision |
| `recipes`, `recipes_job` | time the precision recipes |
| `forecast` | what the budget means here |
| `evaluate`, `build_job` | try one plan: build, measure, compare, judge |
| `certification` | test the candidates on unseen data, choose, judge |
| `record`, `result` | write the record; what the user gets |
| `verify`, `compare` | judge a delivered artefact again; two runs beside each other |

A file that ends in `_job` runs in a process of its own. `values` holds what one step hands to the next.
"""
