// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodes

import "time"

// Sweep is what Run does each minute.
func (c *Client) Sweep(now time.Time) { c.sweep(now) }

// Connected are the nodes that there is a connection to: nobody else can see what is kept.
func (c *Client) Connected() []Node {
	c.mu.Lock()
	defer c.mu.Unlock()
	var list []Node
	for n := range c.conns {
		list = append(list, n)
	}
	return list
}

// Suspects is how many nodes are taken for silent.
func (p *Patient) Suspects() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.suspects)
}
