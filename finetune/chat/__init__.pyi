from .command import talk as talk
from .command import talk_on_page as talk_on_page
