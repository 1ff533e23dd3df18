{{/*
Names are fixed: a cluster has one cri-controller, and a second release must meet the
first one's ClusterRole and not command the same nodes beside it.
*/}}
{{- define "cri-proxy.selector" -}}
app.kubernetes.io/name: cri-controller
{{- end }}

{{- define "cri-proxy.labels" -}}
{{ include "cri-proxy.selector" . }}
{{ include "cri-proxy.labelsOfAll" . }}
{{- end }}

{{- define "cri-proxy.labelsOfAll" -}}
app.kubernetes.io/part-of: cri-proxy
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "cri-proxy.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}
