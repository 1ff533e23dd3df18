// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package view

// Snapshot is how one call sees the containers: whatever was hidden or masked at any moment since
// the call began stays so until the call is answered. The runtime answers as of some moment in
// between, so neither the view before nor the one after is enough. An answer that shows one
// container of a slot before a reveal and the other after it could show the exited one alone, which
// is the end of a pod that is never restarted.
type Snapshot struct {
	visibility *Visibility
	tokens     map[string]struct{} // guarded by visibility.mu
	ids        map[string]Verdict  // guarded by visibility.mu
}

// Snapshot begins a call. [Snapshot.End] must be called when it has been answered.
func (v *Visibility) Snapshot() *Snapshot {
	v.mu.Lock()
	defer v.mu.Unlock()
	s := &Snapshot{
		visibility: v,
		tokens:     make(map[string]struct{}, len(v.tokens)),
		ids:        make(map[string]Verdict, len(v.ids)),
	}
	for t := range v.tokens {
		s.tokens[t] = struct{}{}
	}
	for id := range v.ids {
		if how := v.verdictLocked(id); how != Shown {
			s.ids[id] = how
		}
	}
	v.snapshots[s] = struct{}{}
	return s
}

// noteLocked tells the calls in flight what has become hidden or masked for the claim.
func (v *Visibility) noteLocked(c *Claim, id string, how Verdict) {
	if !c.active {
		return
	}
	for s := range v.snapshots {
		if _, known := s.ids[id]; !known {
			s.ids[id] = how
		}
	}
}

// HideUnacknowledged makes a list show a slot as it was before its reveal, if the list belongs to a
// relist that began then. A list of all containers ends the relist.
func (s *Snapshot) HideUnacknowledged(all bool) {
	s.visibility.mu.Lock()
	defer s.visibility.mu.Unlock()
	h := s.visibility.history
	if all {
		h.inRelist.Store(false)
	}
	for incumbent, u := range h.unacknowledged {
		if !u.early() {
			continue
		}
		for id := u.id; id != ""; id = h.unacknowledged[id].id { // and who has taken its place since
			s.ids[id] = Hidden
		}
		if s.ids[incumbent] != Hidden { // it may have taken another's place itself
			s.ids[incumbent] = Masked
		}
	}
}

// Judge returns how the container is shown in this call's answer. annotations may be nil where the
// answer has none; then only the ID counts.
func (s *Snapshot) Judge(id string, annotations map[string]string) Verdict {
	s.visibility.mu.RLock()
	defer s.visibility.mu.RUnlock()
	if t := annotations[StagedAnnotation]; t != "" {
		if _, ok := s.tokens[t]; ok || s.visibility.suspectLocked(t) {
			return Hidden
		}
	}
	return s.ids[id]
}

// Blank reports whether the snapshot changes nothing so far.
func (s *Snapshot) Blank() bool {
	s.visibility.mu.RLock()
	defer s.visibility.mu.RUnlock()
	return len(s.tokens) == 0 && len(s.ids) == 0 && s.visibility.known == nil
}

// End says that the call has been answered.
func (s *Snapshot) End() {
	s.visibility.mu.Lock()
	defer s.visibility.mu.Unlock()
	delete(s.visibility.snapshots, s)
}
