"""The main job in three lines of Python: a task, a budget, `optimize`.

    python examples/three_lines.py

Writes the run directory `runs/three-lines`; interrupted, the same command goes on where it was.
"""

import penjing as pj
from digits_by_hand import splits, trained

if __name__ == "__main__":
    train, valid, test = splits()
    model = trained(*train)

    task = pj.Task(train=train, valid=valid, test=test)
    budget = pj.Budget(max_drop="4%", latency="90%", size="60%", time="1min", trials=2)
    result = pj.optimize(model, task, budget, out="runs/three-lines", say=print)

    print(result.verdict)
    print(result.report)
    predict = result.load()
    print(predict(test[0][:1]).argmax())
