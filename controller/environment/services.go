// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package environment

import (
	"fmt"
	"net"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// apiServer is the service in the namespace default that each container learns of.
const apiServer = "kubernetes"

// hasIP reports whether the service has an address of its own: other services have no variables.
func hasIP(s *corev1.Service) bool {
	return s.Spec.ClusterIP != "" && s.Spec.ClusterIP != corev1.ClusterIPNone
}

// variablesOf returns the variables of one service (pkg/kubelet/envvars/envvars.go FromServices).
func variablesOf(s *corev1.Service) []*opsv1.Variable {
	var variables []*opsv1.Variable
	set := func(name, value string) { variables = append(variables, literal(name, []byte(value))) }
	prefix, ip := variableName(s.Name), s.Spec.ClusterIP
	set(prefix+"_SERVICE_HOST", ip)
	for i, p := range s.Spec.Ports {
		port, protocol := strconv.Itoa(int(p.Port)), string(corev1.ProtocolTCP)
		if p.Protocol != "" {
			protocol = string(p.Protocol)
		}
		url := strings.ToLower(protocol) + "://" + net.JoinHostPort(ip, port)
		if i == 0 {
			set(prefix+"_SERVICE_PORT", port)
			set(prefix+"_PORT", url)
		}
		if p.Name != "" {
			set(prefix+"_SERVICE_PORT_"+variableName(p.Name), port)
		}
		of := fmt.Sprintf("%s_PORT_%s_%s", prefix, port, strings.ToUpper(protocol))
		set(of, url)
		set(of+"_PROTO", strings.ToLower(protocol))
		set(of+"_PORT", port)
		set(of+"_ADDR", ip)
	}
	return variables
}

func variableName(s string) string { return strings.ToUpper(strings.ReplaceAll(s, "-", "_")) }
