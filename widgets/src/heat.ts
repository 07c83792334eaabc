// Log-probability as colour: one hue (orange, Okabe-Ito vermillion family) over the text's background,
// stronger where the model was more surprised. Readable with any colour vision because only strength
// varies, and each step also has its own underline.

export interface HeatStep {
  /** Lower bound of the token's probability. */
  from: number;
  label: string;
  alpha: number;
}

export const HEAT_STEPS: readonly HeatStep[] = [
  { from: 0.8, label: "\u2265 0.8", alpha: 0 },
  { from: 0.5, label: "0.5", alpha: 0.16 },
  { from: 0.2, label: "0.2", alpha: 0.34 },
  { from: 0.05, label: "0.05", alpha: 0.56 },
  { from: 0, label: "< 0.05", alpha: 0.8 },
];

export const HEAT_RGB = "213, 94, 0";

/** Step of a log-probability; -1 where there is none (a given token). */
export function heatStep(logprob: number | null): number {
  if (logprob === null || Number.isNaN(logprob)) return -1;
  const p = Math.exp(logprob);
  return HEAT_STEPS.findIndex((step) => p >= step.from);
}

export function heatColor(step: number): string {
  const alpha = HEAT_STEPS[step]?.alpha ?? 0;
  return `rgba(${HEAT_RGB}, ${alpha})`;
}
