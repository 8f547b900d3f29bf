"""PPO with a critic (arXiv:1707.06347), the algorithm GRPO leaves the critic out of. Nothing of GRPO needs this module.

    N  scored completion tokens, flat, sequences one after another in order      S  sequences

    rewards_N = token_rewards(rewards_S, lengths_S, kl_N=..., beta=...)         # reward on the last token, KL on each
    advantages_N, returns_N = gae(rewards_N, values_N, lengths_S, gamma=..., lam=...)
    advantages_N = whiten(advantages_N)                                         # over the whole batch
    policy_loss("dapo", logprobs_N, old_logprobs_N, advantages_N, ...)          # token mean, clipped
    value_loss(values_N, old_values_N, returns_N, clip=...)                     # weighted 1 / num_tokens, summed
"""
