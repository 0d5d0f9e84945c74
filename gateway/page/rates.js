// Tokens a second out of counters that only grow, smoothed a little. A counter that fell belongs to another engine.

const SMOOTHING = 0.5;
const SILENCE = 0.05; // below it a fading rate is none

export class Rates {
  #last = new Map(); // key -> {count, at, rate}

  /** Takes a counter's value at `at` (milliseconds) and returns the rate since the one before. */
  tell(key, count, at) {
    const last = this.#last.get(key);
    const rate = last && at > last.at ? this.#next(last, count, at) : 0;
    this.#last.set(key, { count, at, rate });
    return rate;
  }

  /** Forgets what was not told at `at`. */
  sweep(at) {
    for (const [key, last] of this.#last) if (last.at !== at) this.#last.delete(key);
  }

  #next(last, count, at) {
    const now = Math.max(0, count - last.count) / ((at - last.at) / 1000);
    const rate = last.rate + SMOOTHING * (now - last.rate);
    return now === 0 && rate < SILENCE ? 0 : rate;
  }
}
