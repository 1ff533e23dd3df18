// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package deploy installs the manifests and the chart on a real cluster, the controller as pods
// from the image that is built here, and has it work while its leader goes.
//
// The beds have no kube-proxy, so nothing routes the address of the kubernetes Service:
// KUBERNETES_SERVICE_HOST of the controller's pods is set to the API server's own address, and the
// API server calls webhooks at the addresses of their Service's endpoints
// (--enable-aggregator-routing, which is for control planes without kube-proxy). Everything else is
// as shipped: the ServiceAccount's token, the roles, the pod network. The NetworkPolicy is accepted
// and not enforced: the beds' CNI plugin knows none.
package deploy
