// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package nodes sends commands to the cri-proxy of each node, over gRPC with mutual TLS.
package nodes

import (
	"cmp"
	"fmt"
	"net"
	"strconv"

	corev1 "k8s.io/api/core/v1"
)

const (
	// AddressAnnotation on a Node overrides where its cri-proxy listens for commands: HOST or
	// HOST:PORT. The certificate must still be the node's.
	AddressAnnotation = "cri-proxy.io/ops-address"
	// DefaultPort is the TCP port of a node's command interface.
	DefaultPort = 10260
)

// Node is where to reach one node's cri-proxy.
type Node struct {
	// Name of the node. Its certificate must be valid for the name as a DNS name.
	Name string
	// Address is HOST:PORT.
	Address string
}

// Of returns where to reach the cri-proxy of n: its [AddressAnnotation], else its internal address,
// else its host name, with port where none is given; port 0 means [DefaultPort]. The error says
// what the node lacks.
func Of(n *corev1.Node, port int) (Node, error) {
	port = cmp.Or(port, DefaultPort)
	if override := n.Annotations[AddressAnnotation]; override != "" {
		if _, _, err := net.SplitHostPort(override); err == nil {
			return Node{n.Name, override}, nil
		}
		return Node{n.Name, net.JoinHostPort(override, strconv.Itoa(port))}, nil
	}
	for _, kind := range []corev1.NodeAddressType{corev1.NodeInternalIP, corev1.NodeHostName} {
		for _, a := range n.Status.Addresses {
			if a.Type == kind && a.Address != "" {
				return Node{n.Name, net.JoinHostPort(a.Address, strconv.Itoa(port))}, nil
			}
		}
	}
	return Node{}, fmt.Errorf("node %s has neither an InternalIP nor a Hostname in its status; set its annotation %s",
		n.Name, AddressAnnotation)
}
