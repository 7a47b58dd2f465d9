"""How the embedded model is made: its world of captioned pictures and its example subjects.

Needs numpy and Pillow; nothing here knows the service.
"""
