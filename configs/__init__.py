"""The experiments that come with jaxinf, one file each: `--config=digits` names configs/digits.py.

The package is `jaxinf.configs`. A config of one's own starts from one of these,
`from jaxinf.configs import digits`, or from all defaults, `jaxinf.runs.config.default_config`.
"""
