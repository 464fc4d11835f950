"""Rules for other people's pipelines: dynamo backends, inductor passes, passes of torch.fx."""
