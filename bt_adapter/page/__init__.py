"""The web page of the server: questions about clips and a live camera, in a browser. Needs the extra ``[page]``.

``mount.py`` adds the page to the server's application; it calls the same service as the routes of the API.
"""
