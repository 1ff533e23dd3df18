#!/bin/sh
# Writes what follows from the Go sources: deepcopy code, CRDs, the ClusterRole.
# Run it from the root of the repository.
set -eu
GOFLAGS=-mod=mod go -C tools build -o ../bin/controller-gen sigs.k8s.io/controller-tools/cmd/controller-gen
bin/controller-gen object:headerFile=deploy/boilerplate.go.txt paths=./api/apps/... paths=./api/inplace/...
bin/controller-gen crd paths=./api/apps/... paths=./api/inplace/... output:crd:dir=deploy/crds
bin/controller-gen rbac:roleName=cri-controller paths=./controller/... output:rbac:dir=deploy/rbac
# The chart cannot reach outside its folder, so it has copies of what is generated.
rm -f deploy/helm/cri-proxy/files/crds/*.yaml
cp deploy/crds/*.yaml deploy/helm/cri-proxy/files/crds/
cp deploy/rbac/role.yaml deploy/helm/cri-proxy/files/role.yaml
cp deploy/rights/policies.yaml deploy/helm/cri-proxy/files/rights.yaml
# The alert rules, as the Prometheus operator wants them.
{
	cat <<END
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: cri-proxy
  namespace: cri-proxy-system
  labels:
    app.kubernetes.io/name: cri-controller
    app.kubernetes.io/part-of: cri-proxy
spec:
END
	sed -e '/^#/d' -e 's/^/  /' deploy/alerts/cri-proxy.rules.yaml
} >deploy/components/prometheusrule/prometheusrule.yaml
cp deploy/alerts/cri-proxy.rules.yaml deploy/helm/cri-proxy/files/alerts.yaml
