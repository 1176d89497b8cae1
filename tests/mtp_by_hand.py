"""Multi-token prediction with the layers of a model called one by one: what the tests compare with."""

import torch


def rms(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def layers_by_hand(model, ids):
    """Trunk, what the last layer makes of it, how to call a layer, and the way from a layer to logits."""
    length = ids.shape[1]
    positions = torch.arange(length).unsqueeze(0)
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    if model.config.model_type == "gpt2":
        body = model.transformer
        hidden = body.wte(ids) + body.wpe(positions)
        layers, norm = body.h, body.ln_f

        def call(layer, x):
            return layer(x, attention_mask=mask)
    else:
        body = model.model
        hidden = body.embed_tokens(ids) * getattr(model.config, "embedding_multiplier", 1)
        layers, norm = body.layers, getattr(body, "norm", None) or body.final_layernorm
        rotary = body.rotary_emb(hidden, positions)

        def call(layer, x):
            out = layer(x, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
            return out[0] if isinstance(out, tuple) else out

    def logits(x):
        z = model.lm_head(norm(x)) / getattr(model.config, "logits_scaling", 1)
        cap = getattr(model.config, "final_logit_softcapping", None)
        return z if cap is None else cap * torch.tanh(z / cap)

    for layer in layers[:-1]:
        hidden = call(layer, hidden)
    return hidden, call(layers[-1], hidden), call, logits


def logits_by_hand(model, heads, ids):
    """Logits `(B, l, V)` of the model and of each extra head, one after the other."""
    trunk, last, call, logits = layers_by_hand(model, ids)
    found, hidden = [logits(last)], last
    for k, head in enumerate(heads.heads if heads else (), start=1):
        if heads.kind == "parallel":
            hidden = call(head, trunk)
        else:
            embedded = model.get_input_embeddings()(torch.cat([ids[:, k:], ids[:, :k]], dim=1))
            joined = [rms(hidden, head.hidden_norm.weight), rms(embedded, head.embedding_norm.weight)]
            hidden = call(head.layer, torch.cat(joined, -1) @ head.projection.weight.T)
        found.append(logits(hidden))
    return found
