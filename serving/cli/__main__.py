from chameleon_jax.serving.cli import app

app()
