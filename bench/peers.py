"""The gateway, the peers it is measured beside, and how each is set up to do the same work on one core."""

from pathlib import Path

from bench.processes import python
from bench.stage import Server, Stage
from gateway.settings import BUILT_IN

LIMIT = 2_000_000  # requests of a caller, a minute and an hour: counted as ever, and never reached
MANY = 20_000  # connections, or requests in flight: more than any case opens
NGINX_MODULES = Path("/usr/lib/nginx/modules")  # where Debian puts them
LUA_MODULE = "ngx_http_lua_module.so"


# The gateway ----------------------------------------------------------------------------------------------------------


def _gateway(stage: Stage, port: int) -> list[str]:
    return python("gateway", "serve", "--host", "127.0.0.1", "--port", str(port), "--workers", "1")


def _gateway_settings(stage: Stage) -> dict[str, str]:
    settings = {f"{key.upper()}_SERVICE_URL": f"http://127.0.0.1:{stage.service}" for key in BUILT_IN}
    settings |= {"RATE_LIMIT_PER_MINUTE": str(LIMIT), "RATE_LIMIT_PER_HOUR": str(LIMIT)}
    settings |= {"MAX_IN_FLIGHT": str(MANY), "MAX_CONNECTIONS": str(MANY), "DRAIN_DELAY": "0", "DRAIN_TIMEOUT": "1"}
    if stage.redis:
        settings["REDIS_URL"] = f"redis://127.0.0.1:{stage.redis}/0"
    return settings


GATEWAY = Server(
    "gateway",
    "ai-gateway serve: limits, breaker, log, metrics",
    _gateway,
    environment=_gateway_settings,
)


# Its peers ------------------------------------------------------------------------------------------------------------


def _uvicorn(stage: Stage, port: int) -> list[str]:
    options = ["--loop", "uvloop", "--http", "httptools", "--lifespan", "off", "--log-level", "warning"]
    options += ["--no-access-log", "--no-server-header", "--no-date-header", "--port", str(port)]
    return python("uvicorn", "bench.passthrough:app", *options)


NGINX = """
%(modules)s
worker_processes 1;
daemon off;
pid %(directory)s/%(name)s.pid;
error_log stderr warn;
events { worker_connections %(many)d; }
http {
  client_body_temp_path %(directory)s/%(name)s-body;
  proxy_temp_path %(directory)s/%(name)s-proxy;
  fastcgi_temp_path %(directory)s/%(name)s-fastcgi;
  uwsgi_temp_path %(directory)s/%(name)s-uwsgi;
  scgi_temp_path %(directory)s/%(name)s-scgi;
  keepalive_requests 1000000000;
  upstream service {
    server 127.0.0.1:%(service)d;
    keepalive 128;
    keepalive_requests 1000000000;
  }
  %(http)s
  server {
    listen 127.0.0.1:%(port)d backlog=4096;
    location / {
      %(location)s
      proxy_pass http://service;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
    }
  }
}
"""

# LuaJIT in nginx is what Kong and APISIX are made of. Redis is spoken to by hand: Debian has no library for it.
LUA_HTTP = """
  lua_package_path "/usr/share/lua/5.1/?.lua;;";
  log_format line escape=json '{"timestamp":"$time_iso8601","level":"INFO","message":"Request completed",'
    '"correlation_id":"$correlation_id","method":"$request_method","path":"$uri","status_code":$status,'
    '"duration_s":$request_time,"caller":"$caller"}';
  access_log %(directory)s/access.log line;
  init_by_lua_block {
    local function words(...)
      local parts = {"*" .. select("#", ...)}
      for _, word in ipairs({...}) do
        parts[#parts + 1] = "$" .. #word
        parts[#parts + 1] = word
      end
      return table.concat(parts, "\\r\\n") .. "\\r\\n"
    end

    -- The gateway's own script: 1 or 0 for admitted, the debts of minute and hour, two times; nil without Redis.
    function spend(caller)
      local redis = ngx.socket.tcp()
      redis:settimeout(100)
      if not redis:connect("127.0.0.1", %(redis)d) then return nil end
      redis:send(words("EVALSHA", "%(script)s", "1", caller, "%(limit)d", "60000000", "%(limit)d", "3600000000", "1"))
      if redis:receive("*l") ~= "*5" then return nil end
      local reply = {}
      for i = 1, 5 do reply[i] = tonumber(string.sub(redis:receive("*l"), 2)) end
      redis:setkeepalive(60000, 128)
      return reply
    end
  }
"""
LUA_LOCATION = """
      set $correlation_id "";
      set $caller "";
      access_by_lua_block {
        local given = ngx.var.http_x_correlation_id
        ngx.var.correlation_id = given and #given <= 128 and given or ngx.var.request_id
        ngx.var.caller = ngx.var.http_x_user_id or ngx.var.remote_addr
        local reply = spend("peer:" .. ngx.var.caller)
        if not reply then return end
        local fields = ngx.header
        fields["X-RateLimit-Limit-Minute"] = %(limit)d
        fields["X-RateLimit-Limit-Hour"] = %(limit)d
        fields["X-RateLimit-Remaining-Minute"] = math.floor(%(limit)d - reply[2] / 60000000)
        fields["X-RateLimit-Remaining-Hour"] = math.floor(%(limit)d - reply[3] / 3600000000)
        fields["X-RateLimit-Reset-Minute"] = math.ceil((reply[4] + reply[2] / %(limit)d) / 1000000)
        fields["X-RateLimit-Reset-Hour"] = math.ceil((reply[4] + reply[3] / %(limit)d) / 1000000)
        if reply[1] == 0 then return ngx.exit(429) end
      }
      header_filter_by_lua_block { ngx.header["X-Correlation-ID"] = ngx.var.correlation_id }
      proxy_set_header X-Correlation-ID $correlation_id;
"""


def _nginx(
    stage: Stage, port: int, name: str = "nginx", modules: str = "", http: str = "access_log off;", location: str = ""
) -> list[str]:
    facts = {"directory": stage.processes.directory, "name": name, "port": port, "service": stage.service, "many": MANY}
    facts |= {"redis": stage.redis, "script": stage.script, "limit": LIMIT}
    text = NGINX % {**facts, "modules": modules, "http": http % facts, "location": location % facts}
    return ["nginx", "-c", _written(stage, f"{name}.conf", text)]


def _nginx_lua(stage: Stage, port: int) -> list[str]:
    modules = "".join(f"load_module {NGINX_MODULES}/{module};\n" for module in ("ndk_http_module.so", LUA_MODULE))
    return _nginx(stage, port, "nginx-lua", modules, LUA_HTTP, LUA_LOCATION)


HAPROXY = """
global
  nbthread 1
  maxconn %(many)d
defaults
  mode http
  timeout connect 5s
  timeout client 75s
  timeout server 75s
frontend callers
  bind 127.0.0.1:%(port)d
  default_backend service
backend service
  http-reuse always
  server service 127.0.0.1:%(service)d pool-max-conn -1
"""


def _haproxy(stage: Stage, port: int) -> list[str]:
    text = HAPROXY % {"port": port, "service": stage.service, "many": MANY // 4}
    return ["haproxy", "-db", "-f", _written(stage, "haproxy.cfg", text)]


# Caddy keeps 32 idle connections to a service unless told otherwise: fewer than callers here.
CADDY = """
{
    admin off
    auto_https off
}
http://127.0.0.1:%(port)d {
    reverse_proxy 127.0.0.1:%(service)d {
        transport http {
            keepalive_idle_conns_per_host 128
        }
    }
}
"""


def _caddy(stage: Stage, port: int) -> list[str]:
    path = _written(stage, "Caddyfile", CADDY % {"port": port, "service": stage.service})
    return ["caddy", "run", "--config", path, "--adapter", "caddyfile"]


def _written(stage: Stage, name: str, text: str) -> str:
    path = stage.processes.directory / name
    path.write_text(text)
    return str(path)


PEERS = {
    peer.name: peer
    for peer in (
        Server(
            "uvicorn",
            "uvicorn that only passes on: the floor in Python",
            _uvicorn,
            environment=lambda stage: {"SERVICE_PORT": str(stage.service)},
        ),
        Server(
            "nginx-lua",
            "nginx with Lua: the same limits and log",
            _nginx_lua,
            ("nginx", str(NGINX_MODULES / LUA_MODULE), "/usr/share/lua/5.1/resty/core.lua"),
            "nginx libnginx-mod-http-lua lua-resty-core lua-resty-lrucache",
        ),
        Server(
            "caddy",
            "Caddy, which only passes on",
            _caddy,
            ("caddy",),
            "caddy",
            environment=lambda stage: {"GOMAXPROCS": "1", "HOME": str(stage.processes.directory)},
        ),
        Server("nginx", "nginx, which only passes on", _nginx, ("nginx",), "nginx"),
        Server("haproxy", "HAProxy, which only passes on", _haproxy, ("haproxy",), "haproxy"),
    )
}
