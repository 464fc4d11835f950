"""A graph of torch.fx as the engine sees it, and the facts about operations that it goes by."""
