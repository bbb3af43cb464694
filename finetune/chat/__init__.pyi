from .command import Asked as Asked
from .command import talk as talk
from .command import talk_on_page as talk_on_page
from .requirements import require_gradio as require_gradio
