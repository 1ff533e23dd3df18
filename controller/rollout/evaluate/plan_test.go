// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package evaluate_test

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
)

// pods reads a line such as "o+ o-p c+d u+": stage (outdated, changing, updated, broken, left),
// then + for available, ~ for ready but not for long enough, - for not ready, then p for prepared,
// g for being prepared, t for its turn, d for disrupted.
func candidates(line string) []evaluate.Candidate {
	var list []evaluate.Candidate
	for i, word := range strings.Fields(line) {
		c := evaluate.Candidate{Pod: &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("web-%d", i)}},
			Ordinal: i}
		c.Status.Stage = map[byte]evaluate.Stage{'o': evaluate.Outdated, 'c': evaluate.Updating, 'u': evaluate.Updated,
			'b': evaluate.Broken, 'l': evaluate.Skipped}[word[0]]
		for _, x := range word[1:] {
			switch x {
			case '+':
				c.Status.Serving, c.Status.Available = true, true
			case '~':
				c.Status.Serving = true
			case 'p':
				c.Preparation = evaluate.Prepared
			case 'g':
				c.Preparation = evaluate.Preparing
			case 't':
				c.Updating, c.Preparation, c.Status.Disrupted = true, evaluate.Prepared, true
			case 'd':
				c.Status.Disrupted = true
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
		limits  evaluate.Limits
		prepare string
		begin   string
		held    int
	}{
		{"prepares before it begins, a little ahead", "o+ o+ o+ o+ o+", evaluate.Limits{MaxUnavailable: 1}, "[4 3 2]",
			"[]", 0},
		{"begins what is prepared", "o+ o+ o+ o+g o+p", evaluate.Limits{MaxUnavailable: 1}, "[2]", "[4]", 0},
		{"one at a time", "o+ o+p o+p o+p o+t", evaluate.Limits{MaxUnavailable: 1}, "[]", "[4]", 0},
		{"as many as may be", "o+p o+p o+p c-d u+", evaluate.Limits{MaxUnavailable: 3}, "[]", "[2 1]", 0},
		{"what is not ready costs nothing", "o+p o-p o-p u- u-", evaluate.Limits{MaxUnavailable: 1}, "[]", "[2 1]", 0},
		{"what is ready waits for those that are not", "o+p o+p o+p u- u+", evaluate.Limits{MaxUnavailable: 1}, "[]",
			"[]", 0},
		{"what has just become ready costs nothing more", "o~p u+ u+", evaluate.Limits{MaxUnavailable: 1}, "[]", "[0]",
			0},
		{"but there must be room", "o~p u- u+", evaluate.Limits{MaxUnavailable: 1}, "[]", "[]", 0},
		{"pods that lack count", "o+p o+p", evaluate.Limits{Desired: 3, MaxUnavailable: 1}, "[]", "[]", 0},
		{"halted: those that have begun go on", "o+p o+t o+", evaluate.Limits{MaxUnavailable: 2, Halted: true}, "[]",
			"[1]", 0},
		{"in order: none overtakes", "o+p o+p o+g u+", evaluate.Limits{MaxUnavailable: 1, Ordered: true}, "[]", "[]",
			0},
		{"without order one does", "o+p o+p o+g u+", evaluate.Limits{MaxUnavailable: 1}, "[]", "[1]", 0},
		{"the partition keeps the lowest", "o+p o+p o+p o+p", evaluate.Limits{MaxUnavailable: 4, Keep: 3,
			Ordered: true}, "[]", "[3]", 3},
		{"counted from the first ordinal", "o+p o+p o+p o+p", evaluate.Limits{MaxUnavailable: 4, Keep: 3, Ordered: true,
			FirstOrdinal: -1}, "[]", "[3 2]", 2},
		{"the partition keeps a number", "o+p o+p o+p u+", evaluate.Limits{MaxUnavailable: 4, Keep: 2}, "[]", "[2]", 2},
		{"what has begun is not kept", "o+t o+p u+ u+", evaluate.Limits{MaxUnavailable: 4, Keep: 2}, "[]", "[0]", 1},
		{"what is left is no one's business", "l+ l+ o+p", evaluate.Limits{MaxUnavailable: 1}, "[]", "[2]", 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			pods := candidates(tt.pods)
			if tt.limits.Desired == 0 {
				tt.limits.Desired = len(pods)
			}
			tt.limits.Allowed = func(*corev1.Pod) (bool, string) { return true, "" }
			p := evaluate.Next(pods, tt.limits)
			if fmt.Sprint(p.Prepare) != tt.prepare || fmt.Sprint(p.Begin) != tt.begin || p.Held != tt.held {
				t.Errorf("prepare %v, begin %v, held %d; want %s, %s, %d", p.Prepare, p.Begin, p.Held, tt.prepare,
					tt.begin, tt.held)
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
		if down, up := evaluate.Resolve(n, tt.total, false), evaluate.Resolve(n, tt.total, true); down != tt.down ||
			up != tt.up {
			t.Errorf("%s of %d: %d, %d", tt.given, tt.total, down, up)
		}
	}
	if s := (&evaluate.Strategy{MaxUnavailable: intstr.FromString("1%")}); s.UnavailableLimit(10) != 1 {
		t.Error("no pod may ever be changed")
	}
}
