"""memjax: fine-tune, train and serve JAX models that do not fit."""
