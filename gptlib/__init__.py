"""A GPT in plain PyTorch: reference maths, model, data, trainer and sampling. Works with torch alone."""
