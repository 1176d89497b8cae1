import torch


def multi_hot_loss_and_gradient(
    logits,
    labels,
    weights,
    *,
    gradient_scale,
    ignore_index=-100,
    softcap=None,
    logit_scale=1.0,
    write_gradient=True,
):
    valid = labels != ignore_index
    w = weights * valid
    rw = w.sum(-1, keepdim=True)
    z = logits.float()
    if logit_scale != 1.0:
        z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logp = torch.log_softmax(z, -1)
    y = labels.masked_fill(~valid, 0)
    losses = -(w * logp.gather(-1, y)).sum(-1)
    if write_gradient:
        g = logp.exp_().mul_(rw)
        g.scatter_add_(-1, y, -w)
        if softcap is not None:
            g *= 1 - (z / softcap) ** 2
        logits.copy_(g.mul_(gradient_scale * logit_scale))
    return losses
