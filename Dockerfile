# Serves a bundle: docker build -t served . && docker run -p 8000:8000 -v /path/to/bundle:/bundle:ro served
FROM python:3.12-slim
WORKDIR /app
COPY . .
RUN pip install --no-cache-dir .[serve] && useradd --system served
USER served
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz')"
CMD ["python", "-m", "fastai_multi.serve", "/bundle", "--host", "0.0.0.0"]
