/** nginx as the gateway's yardstick: one worker, kept upstream connections, no access log, no limits that would cost it anything. */
import { chown, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import path from 'node:path'
import { findTool } from '../debian.ts'
import { accepts, type Cleanups, type Program } from '../program.ts'

/** Buffers hold a whole 64 KiB body, and of larger ones nothing waits in a file: with the defaults part of both would. */
const config = (port: number, backendPort: number, folder: string, buffers: string): string => `
daemon off;
worker_processes 1;
error_log stderr error;
pid ${folder}/pid;
events { worker_connections 4096; }
http {
  access_log off;
  client_body_temp_path ${folder}/body;
  proxy_temp_path ${folder}/proxy;
  fastcgi_temp_path ${folder}/fastcgi;
  uwsgi_temp_path ${folder}/uwsgi;
  scgi_temp_path ${folder}/scgi;
  keepalive_requests 1000000000;
  tcp_nodelay on;
  upstream backend {
    server 127.0.0.1:${backendPort};
    keepalive 64;
    keepalive_requests 1000000000;
  }
  server {
    listen 127.0.0.1:${port};
    location / {
      proxy_pass http://backend;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $host;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
      proxy_set_header X-Forwarded-Proto $scheme;
      proxy_set_header X-Request-Id $request_id;
      proxy_buffer_size 16k;
      proxy_buffers ${buffers};
      proxy_max_temp_file_size 0;
      proxy_request_buffering off;
      client_max_body_size 0;
    }
  }
}
`

/** @param buffers of one answer, number and size */
export async function startNginx(port: number, backendPort: number, cleanups: Cleanups, buffers = '16 16k'): Promise<Program> {
  const nginx = await findTool('nginx', 'nginx')
  const folder = await mkdtemp(path.join(tmpdir(), 'sp-bench-nginx-'))
  cleanups.add(() => rm(folder, { recursive: true, force: true }))
  // The worker gives up root for nobody and writes there.
  await chown(folder, 65534, 65534).catch(() => {})
  const file = path.join(folder, 'nginx.conf')
  await writeFile(file, config(port, backendPort, folder, buffers))
  return cleanups.start(nginx.file, ['-p', folder, '-e', 'stderr', '-c', file], { env: nginx.env, ready: accepts(port) })
}
