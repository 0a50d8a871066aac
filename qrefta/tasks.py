"""Names of qrefta 0.1 that moved to `qrefta.train.tasks`."""

from qrefta._deprecations import moved

__getattr__ = moved(
    __name__,
    {
        "TASKS": "qrefta.train.tasks:TASKS",
        "load_chat": "qrefta.train.tasks:load_chat",
        "load_images": "qrefta.train.tasks:load_images",
        "load_text": "qrefta.train.tasks:load_text",
        "classify": "qrefta.train.tasks.classify:text_classes",
        "language_model": "qrefta.train.tasks.lm:text_windows",
        "chat": "qrefta.train.tasks.chat:chat_recipe",
        "images": "qrefta.train.tasks.image:image_classes",
    },
)
