"""Prompts in the words a host expects, and images in the shape it was trained on."""

import pytest
import torch
from PIL import Image

from clt.errors import HostModelError
from clt.lm.forms import padded_to_square
from clt.types import Sample
from tests.tiny_hosts import tiny_adapter, tiny_image

TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{{ '<image>\n' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


@pytest.mark.parametrize(
    ("form", "prompt"),
    [
        ("raw", "<image>\nWhat is it?"),
        ("auto", "<image>\nWhat is it?"),
        ("llava-hf", "USER: <image>\nWhat is it? ASSISTANT:"),
        (
            "llava-original",
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT:",
        ),
    ],
)
def test_a_question_is_put_in_the_form_asked_for(form, prompt):
    sample = Sample(id="q", prompt="What is it?", images=(tiny_image(0),))
    asked = tiny_adapter("llava").asked(sample, form)
    assert asked.prompt == prompt
    assert asked.images == sample.images
    assert tiny_adapter("llava").asked(asked, form) == asked, "a finished prompt stays as it is"


def test_a_chat_template_is_used_where_there_is_one_and_missed_where_it_is_asked_for():
    adapter = tiny_adapter("llava")
    sample = Sample(id="q", prompt="What is it?", images=(tiny_image(0),))
    with pytest.raises(HostModelError, match="The host has no chat template"):
        adapter.asked(sample, "chat")
    adapter.processor.chat_template = TEMPLATE
    assert adapter.asked(sample).prompt == "USER: <image>\nWhat is it? ASSISTANT:"
    text = tiny_adapter("llama")
    text.tokenizer.chat_template = TEMPLATE
    assert text.asked(Sample(id="q", prompt="Hi")).prompt == "USER: Hi ASSISTANT:"
    assert text.asked(Sample(id="q", prompt="Hi"), "raw").prompt == "Hi"
    with pytest.raises(HostModelError, match="no placeholder to put in their place"):
        text.asked(sample)


def test_padding_keeps_every_pixel_in_the_middle_of_the_mean_colour():
    adapter = tiny_adapter("llava")
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    square = padded_to_square(wide, adapter.processor)
    assert square.size == (40, 40)
    mean = tuple(int(255 * channel) for channel in adapter.processor.image_processor.image_mean)
    assert [square.getpixel((5, y)) for y in (0, 9, 10, 29, 30, 39)] == [mean, mean, *[(255, 0, 0)] * 2, mean, mean]
    even = tiny_image(0).resize((30, 30))
    assert padded_to_square(even, adapter.processor) is even


def test_padded_images_are_what_the_host_sees():
    """The same as the image processor's own padding, and not the same as its cut."""
    adapter = tiny_adapter("llava")
    sample = Sample(id="q", prompt="<image>\nx", images=(tiny_image(0),))
    cut = adapter.prepare([sample]).tensors["pixel_values"]
    adapter.pads_images = True
    padded = adapter.prepare([sample]).tensors["pixel_values"]
    adapter.pads_images = False
    adapter.processor.image_processor.do_pad = True
    torch.testing.assert_close(adapter.prepare([sample]).tensors["pixel_values"], padded)
    assert (cut - padded).abs().max() > 0.1
