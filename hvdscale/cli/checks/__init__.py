"""Small real jobs that ``hvdscale doctor`` starts on two ranks: each raises if what it checks does not hold."""
