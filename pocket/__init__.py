"""How the embedded model is made: its world of captioned pictures, its trainings, its example subjects.

The world needs numpy and Pillow, the trainings the `server` extra; nothing here knows the service.
"""
