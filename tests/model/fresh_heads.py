"""Run by the tests in a process of its own, without `fat5`: models with heads, loaded by their repositories' own code.

Arguments: files, each with the name of an auto-class, a folder, inputs, the name of an output and what it must be.
"""

import sys

import torch
import transformers

sys.modules["fat5"] = None  # `import fat5` fails, as where it is not installed
torch.set_num_threads(1)

for file in sys.argv[1:]:
    case = torch.load(file)
    auto = getattr(transformers, case["auto_class"])
    for _ in range(2):  # as it was saved, and as it is saved from here
        model = auto.from_pretrained(case["folder"], trust_remote_code=True).eval()
        with torch.no_grad():
            output = model(**case["inputs"])[case["output"]]
        assert (output - case["expected"]).abs().max() <= 1e-5 * case["expected"].abs().max()
        model.save_pretrained(case["folder"])
print("same logits")
