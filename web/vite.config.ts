import { svelte } from '@sveltejs/vite-plugin-svelte'
import { defineConfig } from 'vite'

// One script and one style sheet under fixed names: the server sends them as files, a self-contained page inlines them.
export default defineConfig({
  base: './',
  plugins: [svelte()],
  build: {
    outDir: '../clt/viz/static',
    emptyOutDir: true,
    target: 'es2022',
    modulePreload: false,
    rollupOptions: {
      output: {
        entryFileNames: 'graphs.js',
        assetFileNames: (asset) => (asset.names[0]?.endsWith('.css') ? 'graphs.css' : '[name][extname]'),
      },
    },
  },
  server: { proxy: { '/api': 'http://127.0.0.1:8400' } },
})
