"""The references' rules in NumPy, for one matrix as they store it: ``[outputs, inputs]``, float64, one step a call."""

import numpy as np


def signed(basis):
    """Columns with their largest entry positive."""
    largest = basis[np.abs(basis).argmax(0), np.arange(basis.shape[1])]
    return basis * np.where(largest < 0, -1, 1)


def leading(g, rank, right):
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    return signed(vt[:rank].T) if right else signed(u[:, :rank])


class Adam:
    def __init__(self, b1=0.9, b2=0.999, eps=1e-6):
        self.b1, self.b2, self.eps, self.t, self.m, self.v = b1, b2, eps, 0, 0.0, 0.0

    def ratio(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        return self.m / (np.sqrt(self.v) + self.eps)

    @property
    def correction(self):
        return np.sqrt(1 - self.b2**self.t) / (1 - self.b1**self.t)


class GaLore:
    def __init__(self, rank, gap, scale=0.25):
        self.rank, self.gap, self.scale, self.step, self.adam = rank, gap, scale, 0, Adam()

    def basis(self, g):
        if self.step % self.gap == 0:
            self.p = leading(g, self.rank, self.right)
        self.step += 1

    def down(self, g):
        return g @ self.p if self.right else self.p.T @ g

    def up(self, r):
        return self.scale * (r @ self.p.T if self.right else self.p @ r)

    def __call__(self, g):
        self.right = g.shape[0] >= g.shape[1]
        self.basis(g)
        ratio = self.adam.ratio(self.down(g))
        return self.adam.correction * self.up(ratio)


class QGaLore(GaLore):
    """``encode`` makes a basis what its codes stand for."""

    def __init__(self, rank, gap, encode, threshold=0.4, window=5):
        super().__init__(rank, gap)
        self.encode, self.threshold, self.window, self.past, self.queue = encode, threshold, window, None, []

    def basis(self, g):
        if self.step % self.gap == 0:
            found = leading(g, self.rank, self.right)
            if self.past is not None:
                cosine = abs(self.past @ found[:, 0]) / np.linalg.norm(self.past) / np.linalg.norm(found[:, 0])
                self.queue = [*self.queue, cosine][-self.window :]
                if len(self.queue) == self.window and np.mean(self.queue) >= self.threshold:
                    self.gap *= 2
            self.past = found[:, 0]
            self.p = self.encode(found)
        self.step += 1


class Limiter:
    previous = None

    def __call__(self, s):
        norm = np.linalg.norm(s)
        limit = 1 if self.previous is None else max(norm / (self.previous + 1e-8), 1.01) / 1.01
        self.previous = norm / limit
        return s / limit


class Fira(GaLore):
    def __init__(self, rank, gap):
        super().__init__(rank, gap)
        self.limit = Limiter()

    def __call__(self, g):
        self.right = g.shape[0] >= g.shape[1]
        self.basis(g)
        r = self.down(g)
        ratio, axis = self.adam.ratio(r), int(self.right)
        factor = np.linalg.norm(ratio, axis=axis, keepdims=True) / (np.linalg.norm(r, axis=axis, keepdims=True) + 1e-8)
        return self.adam.correction * (self.up(ratio) + self.limit((g - self.up(r)) * factor))


class Apollo:
    """``projections`` gives the random matrix ``[side, rank]`` of each epoch."""

    def __init__(self, gap, projections, tensor=False, scale=1.0, front=False):
        self.gap, self.projections, self.tensor, self.scale, self.front = gap, projections, tensor, scale, front
        self.step, self.adam, self.limit = 0, Adam(), Limiter()

    def __call__(self, g):
        right = g.shape[0] >= g.shape[1]
        if self.step % self.gap == 0:
            self.p = self.projections[self.step // self.gap]
        self.step += 1
        r = g @ self.p if right else self.p.T @ g
        ratio, axis = self.adam.ratio(r), None if self.tensor else int(right)
        factor = np.linalg.norm(ratio, axis=axis, keepdims=True) / (np.linalg.norm(r, axis=axis, keepdims=True) + 1e-8)
        root = np.sqrt(self.scale)
        scaled = self.limit(g * factor * root) if self.front else self.limit(g * factor) * root
        return self.adam.correction * scaled


class LDAdam:
    def __init__(self, rank, b1=0.908, b2=0.99, eps=1e-8, rho=0.908, feedback=True):
        self.rank, self.b1, self.b2, self.eps, self.rho, self.feedback = rank, b1, b2, eps, rho, feedback
        self.step, self.error = 0, 0.0

    def __call__(self, g):
        if g.shape[0] <= g.shape[1]:
            return self.left(g)
        return self.left(g.T).T

    def left(self, g):
        g, t, c = g + self.error, self.step, self.b1 / (1 - self.b1)
        if t == 0:
            new = leading(g, self.rank, False)
            self.q = np.zeros_like(new)
            self.m = self.v = np.zeros((self.rank, g.shape[1]))
        else:
            b = self.rho * (self.q @ self.m) / (1 - self.b1**t) + (1 - self.rho) * g
            new = np.linalg.qr(b @ (b.T @ self.q))[0]
        r, change = new.T @ g, new.T @ self.q
        m = change @ self.m
        if self.feedback:
            self.error = g - new @ r + c * (self.q @ self.m) - c * (new @ m)
        if t > 0:
            c1, c2 = 1 - self.b1**t, 1 - self.b2**t
            self.v = np.abs(((change**2) @ (self.v / c2 - self.m**2 / c1**2) + m**2 / c1**2) * c2)
        self.m = self.b1 * m + (1 - self.b1) * r
        self.v = self.b2 * self.v + (1 - self.b2) * r**2
        self.q, self.step = new, t + 1
        t = self.step
        return new @ (self.m / (1 - self.b1**t) / (np.sqrt(self.v / (1 - self.b2**t)) + self.eps))
