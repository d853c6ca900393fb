import { mount } from 'svelte'
import App from './App.svelte'
import './app.css'
import { openSource } from './lib/source'
import { AppState } from './lib/state.svelte'

const target = document.getElementById('app')
if (!target) throw new Error('The page has no #app element.')
mount(App, { target, props: { app: new AppState(openSource()) } })
