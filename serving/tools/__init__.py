"""Tool calls in a model's text: how each style of model writes them, and the forms that force one."""
