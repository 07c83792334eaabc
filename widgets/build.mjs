// Bundles src/index.ts into the one file that the wheel ships; `--tests` bundles what node tests need.
import { build } from "esbuild";
import { fileURLToPath } from "node:url";
import path from "node:path";

const here = path.dirname(fileURLToPath(import.meta.url));
const outdir = process.argv.find((arg) => arg.startsWith("--outdir="))?.slice("--outdir=".length);
const tests = process.argv.includes("--tests");

await build({
  absWorkingDir: here,
  entryPoints: tests ? { pure: "src/pure.ts" } : { explorer: "src/index.ts" },
  outdir: outdir ?? path.join(here, tests ? ".test" : "../dendrite_lab/static"),
  outExtension: { ".js": tests ? ".mjs" : ".js" },
  bundle: true,
  format: "esm",
  target: "es2022",
  minify: !tests,
  charset: "ascii",
  legalComments: "none",
  loader: { ".css": "text" },
  logLevel: "warning",
});
