# The sidecar as an image: docker build -t cache-proxy .
FROM python:3.11-slim AS build
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY cache_proxy ./cache_proxy
COPY embeddings ./embeddings
RUN python -m venv /opt/cache-proxy \
 && /opt/cache-proxy/bin/pip install --no-cache-dir --no-compile -c constraints.txt .

FROM python:3.11-slim
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /data cache-proxy \
 && install -d -o cache-proxy -g cache-proxy -m 700 /data
COPY --from=build /opt/cache-proxy /opt/cache-proxy
ENV PATH=/opt/cache-proxy/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    CACHE_PROXY_DATA_DIR=/data \
    CACHE_PROXY_HOST=0.0.0.0
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8080
# Alive, not warm: while the index is being rebuilt requests are answered all the same.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 CMD ["python", "-c", "\
import http.client, sys; \
admin = http.client.HTTPConnection('127.0.0.1', 8081, timeout=2); \
admin.request('GET', '/healthz'); \
sys.exit(admin.getresponse().status != 200)"]
ENTRYPOINT ["cache-proxy"]
CMD ["serve"]
