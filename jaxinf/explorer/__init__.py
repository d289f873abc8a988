"""A run or a store in the browser: `jaxinf explore`, which serves pages to this machine alone.

`findings` gathers what a run has found; `views`, `alike` and `exports` say it as plain values;
`guard` and `app` make it a web application, whose pages are the files in static/; `uploads` scores
new images from the store.
"""
