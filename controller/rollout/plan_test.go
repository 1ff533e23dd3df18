// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// pods reads a line such as "o+ o-p c+d u+": stage (outdated, changing, updated, broken, left), then + for available, ~ for ready
// but not for long enough, - for not ready, then p for prepared, g for being prepared, t for its turn, d for disrupted.
func candidates(line string) []candidate {
	var list []candidate
	for i, word := range strings.Fields(line) {
		c := candidate{pod: &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("web-%d", i)}}, ordinal: i}
		c.verdict.stage = map[byte]stage{'o': outdated, 'c': changing, 'u': updated, 'b': broken, 'l': left}[word[0]]
		for _, x := range word[1:] {
			switch x {
			case '+':
				c.verdict.serving, c.verdict.available = true, true
			case '~':
				c.verdict.serving = true
			case 'p':
				c.preparation = prepared
			case 'g':
				c.preparation = preparing
			case 't':
				c.turn, c.preparation, c.verdict.disrupted = true, prepared, true
			case 'd':
				c.verdict.disrupted = true
			}
		}
		list = append(list, c)
	}
	return list
}

func TestDecide(t *testing.T) {
	tests := []struct {
		name    string
		pods    string
		limits  limits
		prepare string
		begin   string
		held    int
	}{
		{"prepares before it begins, a little ahead", "o+ o+ o+ o+ o+", limits{maxUnavailable: 1}, "[4 3 2]", "[]", 0},
		{"begins what is prepared", "o+ o+ o+ o+g o+p", limits{maxUnavailable: 1}, "[2]", "[4]", 0},
		{"one at a time", "o+ o+p o+p o+p o+t", limits{maxUnavailable: 1}, "[]", "[4]", 0},
		{"as many as may be", "o+p o+p o+p c-d u+", limits{maxUnavailable: 3}, "[]", "[2 1]", 0},
		{"what is not ready costs nothing", "o+p o-p o-p u- u-", limits{maxUnavailable: 1}, "[]", "[2 1]", 0},
		{"what is ready waits for those that are not", "o+p o+p o+p u- u+", limits{maxUnavailable: 1}, "[]", "[]", 0},
		{"what has just become ready costs nothing more", "o~p u+ u+", limits{maxUnavailable: 1}, "[]", "[0]", 0},
		{"but there must be room", "o~p u- u+", limits{maxUnavailable: 1}, "[]", "[]", 0},
		{"pods that lack count", "o+p o+p", limits{desired: 3, maxUnavailable: 1}, "[]", "[]", 0},
		{"halted: those that have begun go on", "o+p o+t o+", limits{maxUnavailable: 2, halted: true}, "[]", "[1]", 0},
		{"in order: none overtakes", "o+p o+p o+g u+", limits{maxUnavailable: 1, ordered: true}, "[]", "[]", 0},
		{"without order one does", "o+p o+p o+g u+", limits{maxUnavailable: 1}, "[]", "[1]", 0},
		{"the partition keeps the lowest", "o+p o+p o+p o+p", limits{maxUnavailable: 4, keep: 3, ordered: true}, "[]", "[3]", 3},
		{"counted from the first ordinal", "o+p o+p o+p o+p", limits{maxUnavailable: 4, keep: 3, ordered: true, firstOrdinal: -1}, "[]", "[3 2]", 2},
		{"the partition keeps a number", "o+p o+p o+p u+", limits{maxUnavailable: 4, keep: 2}, "[]", "[2]", 2},
		{"what has begun is not kept", "o+t o+p u+ u+", limits{maxUnavailable: 4, keep: 2}, "[]", "[0]", 1},
		{"what is left is no one's business", "l+ l+ o+p", limits{maxUnavailable: 1}, "[]", "[2]", 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			pods := candidates(tt.pods)
			if tt.limits.desired == 0 {
				tt.limits.desired = len(pods)
			}
			tt.limits.allowed = func(*corev1.Pod) (bool, string) { return true, "" }
			p := decide(pods, tt.limits)
			if fmt.Sprint(p.prepare) != tt.prepare || fmt.Sprint(p.begin) != tt.begin || p.held != tt.held {
				t.Errorf("prepare %v, begin %v, held %d; want %s, %s, %d", p.prepare, p.begin, p.held, tt.prepare, tt.begin, tt.held)
			}
		})
	}
}

func TestResolve(t *testing.T) {
	for _, tt := range []struct {
		given    string
		total    int
		down, up int
	}{{"3", 10, 3, 3}, {"25%", 10, 2, 3}, {"1%", 10, 0, 1}, {"100%", 7, 7, 7}, {"0%", 7, 0, 0}} {
		n := intstr.Parse(tt.given)
		if down, up := resolve(n, tt.total, false), resolve(n, tt.total, true); down != tt.down || up != tt.up {
			t.Errorf("%s of %d: %d, %d", tt.given, tt.total, down, up)
		}
	}
	if s := (&strategy{maxUnavailable: intstr.FromString("1%")}); s.unavailableLimit(10) != 1 {
		t.Error("no pod may ever be changed")
	}
}
